"""Modules with state, one file a family."""
