"""Wrong requests through a real controller to a real worker, and what must hold of them."""
