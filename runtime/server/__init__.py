"""`pascalvl serve`: one model behind OpenAI's HTTP interface, as an ASGI app; one noun a file."""
