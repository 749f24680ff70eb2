"""One slot: a process of vLLM that serves, or a fine-tune in a process of its own."""
