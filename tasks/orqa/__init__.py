"""Open-domain question answering: how good the passages are that a retriever found."""
