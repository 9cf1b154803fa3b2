"""Layer normalisation of channels-last maps, with the residual sum before it."""
