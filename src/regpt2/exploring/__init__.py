"""A model in; figures, pictures and a page of its insides out."""
