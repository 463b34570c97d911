"""Feed-forward layers as key-value memories: what triggers each, what it says, and how a layer's answer comes of many."""
