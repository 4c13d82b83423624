"""One file per command of `regpt2`: options in, one call, a few lines printed."""
