"""Other tools' files of steering vectors, one file a format, both directions where both exist."""
