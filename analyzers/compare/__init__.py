"""How alike values are: of two sites, of two models, of one model as it learns."""
