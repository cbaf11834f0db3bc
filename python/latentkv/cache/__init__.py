"""What a cache is: formats, layouts, the attention backends that read them, and the machines these run on."""
