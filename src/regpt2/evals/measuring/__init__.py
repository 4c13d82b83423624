"""A model measured: by evaluations of the shelf, or by tasks of the harness."""
