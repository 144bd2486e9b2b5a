//! The guest's kernel: fragments of `kernel-config/` merged over tinyconfig of Debian's source package. The build fails when a symbol that a fragment
//! asks for is not in the final configuration as asked. The source comes from an apt-checked package; the same inputs give the same bytes.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::progress::Progress;
use crate::{cache, packages, shell, workspace};

const SOURCE_PACKAGE: &str = "linux-source-6.12";
/// Part of the cache's key: to be raised when what this file does changes what comes out.
const RECIPE: &str = "1";
/// How many lines `make vmlinux` prints, for the progress.
const LINES_OF_BUILD: usize = 1930;

/// Builds the kernel unless it is in the cache; returns the path of its `vmlinux`.
pub(crate) fn build() -> Result<PathBuf> {
    let fragments = fragments()?;
    let wanted = wanted(&fragments)?;
    packages::ensure(packages::KERNEL)?;
    let version = |program: &str| shell::output(&mut shell::command(program, ["--version"]));
    let source =
        shell::output(&mut shell::command("dpkg-query", ["-W", "-f", "${Version}", SOURCE_PACKAGE]))?;
    let mut key = cache::Key::default()
        .input("recipe", RECIPE.as_bytes())
        .input("source", source.as_bytes())
        .input("compiler", version("gcc")?.as_bytes())
        .input("linker", version("ld")?.as_bytes());
    for (name, text) in &fragments {
        key = key.input(name, text.as_bytes());
    }
    let place = cache::entry("kernel", &key.finish(), |folder| make(folder, &wanted))?;
    Ok(place.join("vmlinux"))
}

fn make(folder: &Path, wanted: &BTreeMap<String, String>) -> Result<()> {
    let work = workspace().join("target/kernel-build");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("cannot empty {}", work.display()))?;
    }
    fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let mut unpacking = Progress::start("unpacking the kernel's source", 0);
    let archive = format!("/usr/src/{SOURCE_PACKAGE}.tar.xz");
    let arguments =
        ["--checkpoint=4000", "--checkpoint-action=echo=%u0 KiB", "--strip-components=1", "-xf", &archive];
    shell::lines(shell::command("tar", arguments).arg("-C").arg(&work), |line| {
        unpacking.line(line.trim_start_matches("tar: "))
    })?;
    unpacking.done();

    shell::output(make_command(&work).args(["-s", "tinyconfig"]))?;
    let config = work.join(".config");
    let tiny = fs::read_to_string(&config).context("tinyconfig wrote no configuration")?;
    fs::write(&config, merge(&tiny, wanted)).context("cannot write the configuration")?;
    shell::output(make_command(&work).args(["-s", "olddefconfig"]))?;
    let is = fs::read_to_string(&config).context("cannot read the configuration")?;
    check_nothing_lost(wanted, &is)?;

    let mut building = Progress::start("building the guest's kernel", LINES_OF_BUILD);
    let jobs = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    shell::lines(make_command(&work).arg(format!("-j{jobs}")).arg("vmlinux"), |line| building.line(line))?;
    building.done();
    shell::output(
        shell::command("strip", ["--strip-all", "-o"]).arg(folder.join("vmlinux")).arg(work.join("vmlinux")),
    )?;
    fs::copy(&config, folder.join("config")).context("cannot keep the configuration")?;
    fs::File::open(folder.join("vmlinux"))?.sync_all()?;
    fs::remove_dir_all(&work).with_context(|| format!("cannot remove {}", work.display()))
}

/// `make` in the source, with everything fixed that would otherwise find its way into the bytes.
fn make_command(work: &Path) -> Command {
    let mut command = shell::command("make", ["-C"]);
    command
        .arg(work)
        .arg("ARCH=x86")
        .env("KBUILD_BUILD_TIMESTAMP", "2025-01-01")
        .env("KBUILD_BUILD_USER", "coracle")
        .env("KBUILD_BUILD_HOST", "coracle")
        .env("LOCALVERSION", "")
        .env("LC_ALL", "C")
        .env_remove("MAKEFLAGS")
        .env_remove("MFLAGS")
        .env_remove("CFLAGS");
    command
}

/// The fragments by name.
fn fragments() -> Result<BTreeMap<String, String>> {
    let folder = workspace().join("kernel-config");
    let mut fragments = BTreeMap::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "config") {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let text =
                fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            fragments.insert(name, text);
        }
    }
    Ok(fragments)
}

/// What the fragments ask for, by symbol. A symbol stands in one fragment only.
fn wanted(fragments: &BTreeMap<String, String>) -> Result<BTreeMap<String, String>> {
    let mut wanted = BTreeMap::new();
    for (name, text) in fragments {
        for (number, line) in text.lines().enumerate() {
            if line.is_empty() || line.starts_with("# ") {
                continue;
            }
            let Some((symbol, value)) =
                line.split_once('=').filter(|(symbol, _)| symbol.starts_with("CONFIG_"))
            else {
                bail!("{name}:{}: neither a comment nor CONFIG_NAME=value: {line}", number + 1);
            };
            if wanted.insert(symbol.to_owned(), value.to_owned()).is_some() {
                bail!("{name}:{}: {symbol} is asked for twice", number + 1);
            }
        }
    }
    Ok(wanted)
}

fn merge(base: &str, wanted: &BTreeMap<String, String>) -> String {
    let mut merged = String::new();
    for line in base.lines() {
        if symbol(line).is_none_or(|symbol| !wanted.contains_key(symbol)) {
            merged.push_str(line);
            merged.push('\n');
        }
    }
    for (symbol, value) in wanted {
        let _ = if value == "n" {
            writeln!(merged, "# {symbol} is not set")
        } else {
            writeln!(merged, "{symbol}={value}")
        };
    }
    merged
}

/// The symbol that a line of a `.config` is about.
fn symbol(line: &str) -> Option<&str> {
    let set = line.split_once('=').map(|(symbol, _)| symbol);
    set.or_else(|| line.strip_prefix("# ")?.strip_suffix(" is not set"))
        .filter(|symbol| symbol.starts_with("CONFIG_"))
}

fn check_nothing_lost(wanted: &BTreeMap<String, String>, config: &str) -> Result<()> {
    let is: BTreeMap<&str, &str> = config
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .collect();
    let mut lost = String::new();
    for (symbol, value) in wanted {
        let got = is.get(symbol.as_str()).copied().unwrap_or("n");
        if got != value {
            writeln!(lost, "  {symbol}={value} became {got}")?;
        }
    }
    if !lost.is_empty() {
        bail!(
            "the kernel's configuration lost what kernel-config/ asks for (a dependency is missing, or another symbol selects it):\n{lost}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(lines: &str) -> Result<BTreeMap<String, String>> {
        wanted(&BTreeMap::from([("a.config".to_owned(), lines.to_owned())]))
    }

    #[test]
    fn a_fragment_replaces_what_tinyconfig_says() {
        let wanted = asked("# why\nCONFIG_A=y\nCONFIG_B=n\n").unwrap();
        assert_eq!(
            merge("# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=y\n", &wanted),
            "CONFIG_C=y\nCONFIG_A=y\n# CONFIG_B is not set\n"
        );
    }

    #[test]
    fn a_lost_symbol_fails_the_build() {
        let wanted = asked("CONFIG_A=y\nCONFIG_B=n\nCONFIG_S=\"x\"\n").unwrap();
        check_nothing_lost(&wanted, "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S=\"x\"\n").unwrap();
        let error = check_nothing_lost(&wanted, "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_S=\"x\"\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("CONFIG_A=y became n") && error.contains("CONFIG_B=n became y"), "{error}");
    }

    #[test]
    fn a_symbol_is_asked_for_once() {
        assert!(asked("CONFIG_A=y\nCONFIG_A=n\n").is_err());
        assert!(asked("CONFIG_A\n").is_err());
    }

    #[test]
    fn the_fragments_are_well_formed() {
        assert!(wanted(&fragments().unwrap()).unwrap().len() > 100);
    }
}
