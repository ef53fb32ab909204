"""Text in, tokens out: sources of documents, the tokenizer, and the packed stream that training draws from."""
