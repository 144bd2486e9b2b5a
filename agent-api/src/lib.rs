//! The API between host and guest: types, versions, stream framing.
