//! Image archives, manifests and layers.
