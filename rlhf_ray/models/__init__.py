"""What is known of a Hugging Face model without running it."""
