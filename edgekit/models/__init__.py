"""Presets by name, in a plain dict."""
