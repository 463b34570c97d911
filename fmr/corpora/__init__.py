"""Values of a whole corpus on disk: streamed into shards, gone on with after a kill, read back as one array."""
