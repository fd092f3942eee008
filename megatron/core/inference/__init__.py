"""Text generation: requests and their queue, the cached forward pass, the decoding loop, and an engine over them."""
