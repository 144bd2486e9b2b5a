//! What a container that has the engine's socket may mount by it: no more of the host than people let that container itself have. What other
//! containers have, it reaches as any client does: from inside of them.

use std::path::{Path, PathBuf};

use super::{Wanted, shown};
use crate::{
    container::record::{Bind, Record},
    egress::policy::Policy,
    error::{Error, Kind, Result},
};

/// Recognizes the engine's own socket among what is wanted, and binds the rest to what the container that asks has, if it is one that asks.
pub(crate) fn confine(wanted: &mut Wanted, sockets: &[PathBuf], asker: Option<&Record>) -> Result<()> {
    for bind in &mut wanted.binds {
        bind.engine |= sockets.iter().any(|socket| socket == Path::new(&bind.source));
        if let Some(asker) = asker.filter(|_| !bind.engine) {
            bind.within = granted(bind, asker)?;
        }
    }
    Ok(())
}

/// Refuses the engine's socket to a container whose way out is to be narrow: by the socket it could make others.
pub(crate) fn check_policy(wanted: &Wanted, policy: &Policy) -> Result<()> {
    match wanted.binds.iter().any(|bind| bind.engine) && *policy != Policy::All {
        true => Err(Error::invalid(
            "a container with the engine's socket can make others that reach everything: it cannot have the label coracle.egress too",
        )),
        false => Ok(()),
    }
}

/// The trees that a wanted one is in: from the one that a person named to the one that the container has that asks.
fn granted(bind: &Bind, asker: &Record) -> Result<Vec<String>> {
    let has = |own: &&Bind| {
        !own.engine && (bind.readonly || !own.readonly) && Path::new(&bind.source).starts_with(&own.source)
    };
    let own = asker.binds.iter().filter(has).max_by_key(|own| own.source.len()).ok_or_else(|| {
        Error::new(
            Kind::Denied,
            format!(
                "{} is not in anything of the host that container {} has{}: mount it into that container, too",
                shown(&bind.source),
                asker.name,
                if bind.readonly { "" } else { " and may write to" }
            ),
        )
    })?;
    Ok(own.within.iter().chain([&own.source]).cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{container::options::CreateRequest, sandbox::SandboxId};

    fn bind(source: &str, readonly: bool) -> Bind {
        Bind {
            source: source.to_owned(),
            path: "/x".to_owned(),
            readonly,
            create: true,
            mode: String::new(),
            propagation: "rprivate".to_owned(),
            engine: false,
            within: Vec::new(),
        }
    }

    fn asker(binds: Vec<Bind>) -> Record {
        let CreateRequest { config, host_config, .. } =
            CreateRequest::parse(br#"{"Image":"x","Cmd":["a"]}"#).unwrap();
        let image = format!("sha256:{}", "0".repeat(64)).parse().unwrap();
        let id = "a".repeat(64).parse().unwrap();
        let sandbox = SandboxId::shared();
        let mut record = Record::new(
            id,
            "asker".to_owned(),
            sandbox,
            &image,
            "linux/amd64".to_owned(),
            config,
            host_config,
        );
        record.binds = binds;
        record
    }

    #[test]
    fn no_more_is_had_than_the_asker_has() {
        let inner = Bind { within: vec!["/top".to_owned()], ..bind("/top/inner", false) };
        let asker = asker(vec![bind("/a/b", false), bind("/ro", true), inner]);
        for (source, readonly, within) in [
            ("/a/b", false, &["/a/b"][..]),
            ("/a/b/c/d", true, &["/a/b"]),
            ("/ro/x", true, &["/ro"]),
            ("/top/inner/x", false, &["/top", "/top/inner"]),
            ("/ro/x", false, &[]),
            ("/a", true, &[]),
            ("/a/bc", false, &[]),
            ("/", true, &[]),
            ("/top", true, &[]),
        ] {
            let mut wanted = Wanted { volumes: Vec::new(), binds: vec![bind(source, readonly)] };
            match confine(&mut wanted, &[], Some(&asker)) {
                Ok(()) => assert_eq!(wanted.binds[0].within, within, "{source}"),
                Err(error) => assert_eq!((error.status().as_u16(), within.len()), (403, 0), "{source}"),
            }
        }
    }

    #[test]
    fn the_engines_own_socket_is_known_by_its_path() {
        let mut wanted = Wanted { volumes: Vec::new(), binds: vec![bind("/home/me/docker.sock", true)] };
        confine(&mut wanted, &["/home/me/docker.sock".into()], Some(&asker(Vec::new()))).unwrap();
        assert!(wanted.binds[0].engine);
        assert!(check_policy(&wanted, &Policy::All).is_ok());
        assert_eq!(check_policy(&wanted, &Policy::None).unwrap_err().status(), 400);
    }
}
