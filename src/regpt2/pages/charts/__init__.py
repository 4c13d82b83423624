"""Series in, drawn charts out."""
