"""Facts changed in the weights of one memory, with what that does to everything else; undone to the bit."""
