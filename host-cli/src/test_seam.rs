//! Sandboxes that are an agent as an ordinary process: a test seam, which is compiled with the feature `test-seam` only.
