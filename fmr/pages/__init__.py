"""A run as one page for a browser: `page` reads it with its structure, `assets/` is what the browser runs."""
