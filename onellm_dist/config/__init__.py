"""Recipes: their schema, and how they are loaded and checked."""
