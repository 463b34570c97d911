"""Recorded runs run again: the part that an edit reaches, and many edited runs as rows of one."""
