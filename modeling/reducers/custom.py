"""Reducers of this checkpoint that do not come with AdaVTP, by name. Saving a model writes this file."""

CUSTOM_REDUCERS = {}
