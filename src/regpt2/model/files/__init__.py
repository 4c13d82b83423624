"""Files of weights, settings and vocabularies in, checked; a model out."""
