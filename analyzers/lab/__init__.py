"""Experiments that are kept with their code, arguments, seeds and results; tests over seeds, profiles, pages."""
