"""What all other packages build on: protocols, argument checks, seeds, errors, progress."""
