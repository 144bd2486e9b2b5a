//! `coracle bundle`: makes the one file to download.

use std::fs::File;

use anyhow::Context;

use crate::{args::BundleArgs, bundle, failure::Outcome};

/// Writes the executable with the guest inside.
pub(crate) fn run(args: &BundleArgs) -> Outcome {
    let base = args.base.clone().unwrap_or_else(|| "/proc/self/exe".into());
    let base = File::open(&base).with_context(|| format!("cannot open the executable {}", base.display()))?;
    bundle::write(&base, [&args.kernel, &args.initramfs, &args.data], &args.output)?;
    Ok(0)
}
