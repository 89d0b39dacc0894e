"""Bundles on other people's servers."""
