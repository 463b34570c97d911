"""Probes: what can be read off the values at a site, beside what the same probe reads of labels that mean nothing."""
