"""A grid over the settings of one recipe: the best place, the places that cannot be told from it, tables, pictures."""
