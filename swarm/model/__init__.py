"""A run config becomes a Hugging Face model, cut into fragments; a trained model becomes a plain folder of theirs."""
