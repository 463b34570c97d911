"""How few numbers an answer needs, what a model knows of facts, and which of them its weights alone tell."""
