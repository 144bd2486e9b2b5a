//! Manifests and indexes, Docker's (schema 2) and OCI's, and the choice of a platform. They come from a registry: what
//! could be read as two things is refused, and so is what is no image, by its name.

use serde::{Deserialize, Serialize};

use super::error::{RegistryError, clip};
use crate::config::{Platform, or_default};
use crate::digest::Digest;

pub(super) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(super) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(super) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(super) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(super) const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub(super) const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// What is asked for.
pub(super) const ACCEPT: [&str; 4] = [OCI_INDEX, DOCKER_LIST, OCI_MANIFEST, DOCKER_MANIFEST];
/// Docker's own limit.
pub(super) const MAX_MANIFEST: usize = 4 << 20;
const MAX_LAYERS: usize = 4096;

/// A descriptor of a blob or a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// How long it is.
    pub size: u64,
    /// Its digest.
    pub digest: Digest,
    /// In an index: for which platform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// In an index: buildx marks attestations here.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "serde_json::Map::is_empty")]
    pub annotations: serde_json::Map<String, serde_json::Value>,
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageManifest {
    /// Its config.
    pub config: Descriptor,
    /// Its layers, lowest first.
    pub layers: Vec<Descriptor>,
}

/// What a registry has under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// An image.
    Image(ImageManifest),
    /// A choice of images; what are no images is left out.
    Index(Vec<Descriptor>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Anything {
    #[serde(default)]
    schema_version: Option<u64>,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    artifact_type: Option<String>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
    /// Entries of an index may be of kinds that are not known here: only those that are, are looked into.
    #[serde(default)]
    manifests: Option<Vec<serde_json::Value>>,
}

impl Descriptor {
    pub(super) fn new(media_type: &str, size: u64, digest: Digest) -> Self {
        let annotations = serde_json::Map::new();
        Self { media_type: media_type.to_owned(), size, digest, platform: None, annotations }
    }
}

impl Document {
    /// Parses what the store kept, which says itself what it is, unless it is OCI's.
    pub(crate) fn parse_stored(json: &[u8]) -> Result<Self, RegistryError> {
        Self::parse(None, json)
            .or_else(|_| Self::parse(Some(OCI_MANIFEST), json))
            .map(|(document, _)| document)
    }

    /// Parses what came under this `Content-Type`.
    pub fn parse(content_type: Option<&str>, json: &[u8]) -> Result<(Self, String), RegistryError> {
        let what = "manifest";
        let any: Anything =
            serde_json::from_slice(json).map_err(|source| RegistryError::Json { what, source })?;
        let stated = content_type.map(|kind| kind.split(';').next().unwrap_or_default().trim());
        let media_type = any.media_type.clone().or_else(|| stated.map(str::to_owned)).unwrap_or_default();
        if let (Some(inner), Some(outer)) = (&any.media_type, stated)
            && inner != outer
            && ACCEPT.contains(&outer)
        {
            return Err(RegistryError::Unsupported(format!(
                "the manifest calls itself {}, but the registry calls it {outer}",
                clip(inner)
            )));
        }
        if any.schema_version == Some(1) || media_type.contains("manifest.v1+") && !media_type.contains("oci")
        {
            return Err(RegistryError::Unsupported(
                "the image is in Docker's old format (manifest version 2, schema 1), which is not supported: push it anew"
                    .to_owned(),
            ));
        }
        let document = match (media_type.as_str(), any) {
            (
                _,
                Anything { manifests: Some(_), layers: Some(_), .. }
                | Anything { manifests: Some(_), config: Some(_), .. },
            ) => {
                return Err(RegistryError::Unsupported(
                    "the manifest is an image and an index at the same time".to_owned(),
                ));
            }
            (DOCKER_LIST | OCI_INDEX, Anything { manifests: Some(entries), .. }) => {
                Self::Index(entries.into_iter().filter_map(entry).collect())
            }
            (
                DOCKER_MANIFEST | OCI_MANIFEST,
                Anything { config: Some(config), layers, artifact_type, .. },
            ) => {
                let layers = layers.unwrap_or_default();
                check_config(&config, artifact_type.as_deref())?;
                layers.iter().try_for_each(check_layer)?;
                if layers.len() > MAX_LAYERS {
                    return Err(RegistryError::Unsupported(format!(
                        "the image has more than {MAX_LAYERS} layers"
                    )));
                }
                Self::Image(ImageManifest { config, layers })
            }
            (DOCKER_LIST | OCI_INDEX | DOCKER_MANIFEST | OCI_MANIFEST, _) => {
                return Err(RegistryError::Unsupported(format!(
                    "the manifest is no {media_type}, as which it came"
                )));
            }
            _ => {
                return Err(RegistryError::Unsupported(format!(
                    "the media type of the manifest is not supported: {}",
                    clip(&media_type)
                )));
            }
        };
        Ok((document, media_type))
    }
}

/// An entry of an index, if it can be an image.
fn entry(value: serde_json::Value) -> Option<Descriptor> {
    let descriptor: Descriptor = serde_json::from_value(value).ok()?;
    let is_known = ACCEPT.contains(&descriptor.media_type.as_str());
    let is_attestation = descriptor.annotations.contains_key("vnd.docker.reference.type");
    let platform = descriptor.platform.as_ref();
    let is_unknown =
        platform.is_some_and(|platform| platform.architecture == "unknown" || platform.os == "unknown");
    (is_known && !is_attestation && !is_unknown).then_some(descriptor)
}

fn check_config(config: &Descriptor, artifact: Option<&str>) -> Result<(), RegistryError> {
    let refused = |kind: &str, what: &str| {
        let kind = clip(kind);
        Err(RegistryError::Unsupported(format!("Encountered remote {kind:?}({what}) when fetching")))
    };
    match (config.media_type.as_str(), artifact) {
        (kind @ "application/vnd.docker.plugin.v1+json", _) => refused(kind, "plugin"),
        (_, Some(kind)) if !kind.is_empty() => refused(kind, "artifact"),
        // The last two are what some old registries say.
        (DOCKER_CONFIG | "application/vnd.oci.image.config.v1+json" | "application/octet-stream" | "", _) => {
            Ok(())
        }
        (kind, _) => refused(kind, "unknown"),
    }
}

fn check_layer(layer: &Descriptor) -> Result<(), RegistryError> {
    let kind = layer.media_type.as_str();
    let is_foreign = kind.contains("foreign") || kind.contains("nondistributable");
    if is_foreign {
        return Err(RegistryError::Unsupported(format!(
            "layer {} is of the foreign media type {}, which is kept outside of registries and not supported",
            layer.digest,
            clip(kind)
        )));
    }
    let known = [
        "application/vnd.docker.image.rootfs.diff.tar",
        DOCKER_LAYER,
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
    ];
    if known.contains(&kind) {
        return Ok(());
    }
    Err(RegistryError::Unsupported(format!(
        "layer {} is of the media type {}, which is not supported",
        layer.digest,
        clip(kind)
    )))
}

/// The image in an index that fits best.
pub(super) fn choose<'a>(
    entries: &'a [Descriptor],
    wanted: &Platform,
) -> Result<&'a Descriptor, RegistryError> {
    let ranked = entries.iter().filter_map(|entry| {
        let rank = match &entry.platform {
            Some(platform) => wanted.accepts(platform)?,
            // Without a platform it may be anything: better than nothing.
            None => u8::MAX,
        };
        Some((rank, entry))
    });
    // Of equals the first counts.
    let best = ranked.min_by_key(|(rank, _)| *rank);
    best.map(|(_, entry)| entry).ok_or_else(|| RegistryError::NoPlatform(wanted.clone()))
}

/// A manifest as it is pushed: Docker's, schema 2.
pub(super) fn render(config: &Descriptor, layers: &[Descriptor]) -> Vec<u8> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Rendered<'a> {
        schema_version: u8,
        media_type: &'static str,
        config: &'a Descriptor,
        layers: &'a [Descriptor],
    }
    let rendered = Rendered { schema_version: 2, media_type: DOCKER_MANIFEST, config, layers };
    serde_json::to_vec_pretty(&rendered).expect("descriptors have no maps with odd keys")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn descriptor(kind: &str, platform: Option<&str>) -> serde_json::Value {
        let mut value = json!({ "mediaType": kind, "size": 7, "digest": Digest::of(kind.as_bytes()) });
        if let Some(platform) = platform {
            let platform: Platform = platform.parse().unwrap();
            value["platform"] = serde_json::to_value(platform).unwrap();
        }
        value
    }

    fn parse(content_type: &str, json: &serde_json::Value) -> Result<Document, String> {
        let parsed = Document::parse(Some(content_type), json.to_string().as_bytes());
        parsed.map(|(document, _)| document).map_err(|error| error.to_string())
    }

    fn image(config: &str, layer: &str) -> serde_json::Value {
        json!({ "schemaVersion": 2, "config": descriptor(config, None), "layers": [descriptor(layer, None)] })
    }

    #[test]
    fn images_of_both_kinds_are_understood() {
        let oci =
            image("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar+zstd");
        for (kind, document) in [(DOCKER_MANIFEST, image(DOCKER_CONFIG, DOCKER_LAYER)), (OCI_MANIFEST, oci)] {
            assert!(matches!(parse(kind, &document), Ok(Document::Image(_))), "{kind}");
        }
    }

    #[test]
    fn what_is_no_image_is_refused_by_name() {
        for (config, layer, says) in [
            ("application/vnd.docker.plugin.v1+json", DOCKER_LAYER, "(plugin)"),
            ("application/vnd.cncf.helm.config.v1+json", DOCKER_LAYER, "helm"),
            (DOCKER_CONFIG, "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign"),
            (DOCKER_CONFIG, "application/vnd.oci.image.layer.nondistributable.v1.tar", "nondistributable"),
            (DOCKER_CONFIG, "application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"),
        ] {
            let error = parse(DOCKER_MANIFEST, &image(config, layer)).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
        let artifact = json!({ "artifactType": "application/x-sbom", "layers": [],
            "config": descriptor("application/vnd.oci.empty.v1+json", None) });
        assert!(parse(OCI_MANIFEST, &artifact).unwrap_err().contains("x-sbom"));
        let old = json!({ "schemaVersion": 1, "fsLayers": [] });
        assert!(
            parse("application/vnd.docker.distribution.manifest.v1+prettyjws", &old)
                .unwrap_err()
                .contains("schema 1")
        );
    }

    #[test]
    fn what_could_be_two_things_is_refused() {
        let mut both = image(DOCKER_CONFIG, DOCKER_LAYER);
        both["manifests"] = json!([]);
        assert!(parse(OCI_INDEX, &both).unwrap_err().contains("at the same time"));
        let mut renamed = image(DOCKER_CONFIG, DOCKER_LAYER);
        renamed["mediaType"] = json!(DOCKER_LIST);
        assert!(parse(DOCKER_MANIFEST, &renamed).unwrap_err().contains("calls itself"));
        assert!(parse(OCI_INDEX, &image(DOCKER_CONFIG, DOCKER_LAYER)).is_err());
        assert!(parse("text/html", &json!({})).is_err());
    }

    #[test]
    fn an_index_forgets_what_is_no_image() {
        let mut attestation = descriptor(OCI_MANIFEST, Some("linux/amd64"));
        attestation["annotations"] = json!({ "vnd.docker.reference.type": "attestation-manifest" });
        let index = json!({ "manifests": [
            descriptor(OCI_MANIFEST, Some("unknown/unknown")), attestation,
            descriptor("application/x-future", Some("linux/amd64")), json!({ "odd": 1 }),
            descriptor(OCI_MANIFEST, Some("linux/arm64/v8")),
        ] });
        let Ok(Document::Index(entries)) = parse(OCI_INDEX, &index) else { panic!("no index") };
        assert_eq!(entries.len(), 1);
        let wanted = |text: &str| choose(&entries, &text.parse().unwrap()).map(|entry| entry.digest).ok();
        assert!(wanted("linux/arm64").is_some());
        let error = choose(&entries, &"linux/amd64".parse().unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "no matching manifest for linux/amd64 in the manifest list entries");
    }

    #[test]
    fn the_nearest_variant_is_chosen() {
        let entries: Vec<Descriptor> =
            ["linux/amd64/v3", "linux/amd64", "linux/arm/v5", "linux/arm/v6", "linux/arm64"]
                .iter()
                .map(|platform| serde_json::from_value(descriptor(OCI_MANIFEST, Some(platform))).unwrap())
                .collect();
        for (wanted, chosen) in [
            ("linux/amd64", Some("linux/amd64")),
            ("linux/amd64/v3", Some("linux/amd64/v3")),
            ("linux/arm/v7", Some("linux/arm/v6")),
            ("linux/arm", Some("linux/arm/v6")),
            ("linux/arm64/v8", Some("linux/arm64")),
            ("linux/s390x", None),
            ("windows/amd64", None),
        ] {
            let found = choose(&entries, &wanted.parse().unwrap()).ok();
            let found = found.map(|entry| entry.platform.clone().unwrap().to_string());
            assert_eq!(found.as_deref(), chosen, "{wanted}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Document::parse(Some(OCI_INDEX), &bytes);
        }
    }
}
