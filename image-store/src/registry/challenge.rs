//! `WWW-Authenticate`: how a registry wants to be convinced. It comes from the network; what is malformed or unknown
//! is skipped.

use http::HeaderMap;
use http::header::WWW_AUTHENTICATE;

/// The most that is looked at.
const MAX_CHALLENGES: usize = 16;

/// What a registry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// A token from a token server.
    Bearer {
        /// The token server's URL, as it was sent.
        realm: String,
        /// The registry's name there.
        service: Option<String>,
        /// What the token must allow.
        scope: Option<String>,
        /// What was wrong with the token that was sent.
        error: Option<String>,
    },
    /// User name and password.
    Basic,
}

impl Challenge {
    /// All that can be understood, in their order.
    pub fn parse_all(headers: &HeaderMap) -> Vec<Self> {
        let values = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        values.flat_map(Self::parse).take(MAX_CHALLENGES).collect()
    }

    fn parse(value: &str) -> Vec<Self> {
        let parsed = http_auth::parse_challenges(value).unwrap_or_default();
        parsed.iter().filter_map(Self::from_parsed).collect()
    }

    fn from_parsed(parsed: &http_auth::ChallengeRef<'_>) -> Option<Self> {
        let parameter = |name: &str| {
            let found = parsed.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped()).filter(|value| !value.is_empty())
        };
        match parsed.scheme.to_ascii_lowercase().as_str() {
            "bearer" => Some(Self::Bearer {
                realm: parameter("realm")?,
                service: parameter("service"),
                scope: parameter("scope"),
                error: parameter("error"),
            }),
            "basic" => Some(Self::Basic),
            _ => None,
        }
    }

    /// The token that was sent does not allow what was asked for.
    pub(super) fn is_insufficient_scope(&self) -> bool {
        matches!(self, Self::Bearer { error: Some(error), .. } if error == "insufficient_scope")
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn parse(value: &[u8]) -> Vec<Challenge> {
        let mut headers = HeaderMap::new();
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_bytes(value).unwrap());
        Challenge::parse_all(&headers)
    }

    #[test]
    fn dockers_challenges_are_understood() {
        let hub =
            br#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/x:pull",error="insufficient_scope""#;
        let [challenge] = parse(hub).try_into().unwrap();
        assert!(challenge.is_insufficient_scope());
        let Challenge::Bearer { realm, service, scope, .. } = challenge else { panic!("not bearer") };
        assert_eq!(realm, "https://auth.docker.io/token");
        assert_eq!(service.as_deref(), Some("registry.docker.io"));
        assert_eq!(scope.as_deref(), Some("repository:library/x:pull"));
        assert_eq!(parse(b"basic realm=\"Registry Realm\""), [Challenge::Basic]);
        assert_eq!(parse(b"Negotiate, Basic realm=\"x\""), [Challenge::Basic]);
    }

    #[test]
    fn what_is_malformed_is_no_challenge() {
        for bad in [
            &b""[..],
            b"Bearer",
            b"Bearer service=x",
            b"\xff\xfe",
            b"Bearer realm=\"",
            b",,,=",
            b"Bearer realm=",
        ] {
            assert_eq!(parse(bad), [], "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_header_is_parsed_without_panic(value in proptest::collection::vec(0x20_u8..0x7f, 0..200)) {
            parse(&value);
        }
    }
}
