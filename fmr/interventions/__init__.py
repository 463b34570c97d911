"""Edits at sites as one module: trained, inside other modules, saved, and put to work on another copy of the model."""
