use proptest::prelude::*;

use super::*;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn normal(text: &str) -> String {
    text.parse::<Reference>().unwrap().to_string()
}

#[test]
fn short_names_get_registry_namespace_and_tag() {
    assert_eq!(normal("busybox"), "docker.io/library/busybox:latest");
    assert_eq!(normal("busybox:1.36"), "docker.io/library/busybox:1.36");
    assert_eq!(normal("user/app"), "docker.io/user/app:latest");
    assert_eq!(normal("docker.io/busybox"), "docker.io/library/busybox:latest");
    assert_eq!(normal("index.docker.io/busybox"), "docker.io/library/busybox:latest");
    assert_eq!(normal("quay.io/a/b/c:v1"), "quay.io/a/b/c:v1");
}

#[test]
fn the_first_element_is_a_registry_only_if_it_looks_like_one() {
    assert_eq!(normal("localhost/app"), "localhost/app:latest");
    assert_eq!(normal("localhost:5000/app"), "localhost:5000/app:latest");
    assert_eq!(normal("localhost:5000"), "docker.io/library/localhost:5000");
    assert_eq!(normal("local/app"), "docker.io/local/app:latest");
    assert_eq!(normal("Registry/app"), "Registry/app:latest");
    assert_eq!(normal("127.0.0.1:5000/a/b:c"), "127.0.0.1:5000/a/b:c");
    assert_eq!(normal("[::1]:5000/app:1"), "[::1]:5000/app:1");
    assert_eq!(normal("[2001:db8::1]/app"), "[2001:db8::1]/app:latest");
}

#[test]
fn a_digest_is_kept_and_needs_no_tag() {
    assert_eq!(normal(&format!("busybox@{DIGEST}")), format!("docker.io/library/busybox@{DIGEST}"));
    let both: Reference = format!("localhost:5000/busybox:1.36@{DIGEST}").parse().unwrap();
    assert_eq!(both.tag(), Some("1.36"));
    assert_eq!(both.digest().unwrap().to_string(), DIGEST);
    assert_eq!(both.name(), format!("localhost:5000/busybox@{DIGEST}"));
}

#[test]
fn familiar_forms_are_short_and_parse_back() {
    for (text, familiar) in [
        ("docker.io/library/busybox", "busybox:latest"),
        ("docker.io/user/app:1", "user/app:1"),
        ("quay.io/app", "quay.io/app:latest"),
        ("docker.io/foo.bar/app", "docker.io/foo.bar/app:latest"),
        ("docker.io/library/a/b", "library/a/b:latest"),
    ] {
        let reference: Reference = text.parse().unwrap();
        assert_eq!(reference.familiar(), familiar);
        assert_eq!(familiar.parse::<Reference>().unwrap(), reference);
    }
    let like_an_id = format!("docker.io/library/{}", "a".repeat(64));
    let reference: Reference = like_an_id.parse().unwrap();
    assert_eq!(reference.familiar().parse::<Reference>().unwrap(), reference);
}

#[test]
fn what_the_grammar_does_not_allow_is_refused_with_its_reason() {
    use ReferenceError as E;
    let refused = |text: &str| text.parse::<Reference>().unwrap_err();
    assert_eq!(refused(""), E::Empty);
    assert!(matches!(refused(&"a".repeat(64)), E::Identifier(_)));
    assert!(matches!(refused("Busybox"), E::Uppercase(_)));
    assert!(matches!(refused("quay.io/Team/app"), E::Uppercase(_)));
    assert!(matches!(refused("-a.com/app"), E::Domain(_)));
    assert!(matches!(refused("a_b.com/app"), E::Domain(_)));
    assert!(matches!(refused("[::1/app"), E::Domain(_)));
    assert!(matches!(refused("host:/app"), E::Domain(_)));
    for bad in
        ["a//b", "a/", "/a", "a..b", "a___b", "-a", "a-", "a/../b", "a b", "a\n", "é", "https://a.com/b"]
    {
        assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
    }
    assert!(matches!(refused("busybox:"), E::Tag(_)));
    assert!(matches!(refused("busybox:.a"), E::Tag(_)));
    assert!(matches!(refused(&format!("busybox:{}", "a".repeat(129))), E::Tag(_)));
    assert!(matches!(refused("busybox@sha256:abc"), E::Digest(..)));
    assert!(matches!(refused("busybox@md5:d41d8cd98f00b204e9800998ecf8427e"), E::Digest(..)));
    assert!(matches!(refused(&format!("a/{}", "b".repeat(254))), E::NameTooLong(_)));
    assert_eq!(refused(&"a".repeat(5000)), E::TooLong);
}

#[test]
fn docker_hub_has_one_identity_under_three_names() {
    assert!(same_registry("docker.io", "registry-1.docker.io"));
    assert!(same_registry("index.docker.io", "docker.io"));
    assert!(!same_registry("docker.io", "docker.io.example.com"));
    assert!(same_registry("Quay.io", "quay.io"));
    assert!(!same_registry("quay.io", "quay.io:5000"));
    assert_eq!("busybox".parse::<Reference>().unwrap().registry_host(), "registry-1.docker.io");
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused_but_never_panics(text in "\\PC{0,300}") {
        let _ = text.parse::<Reference>();
    }

    #[test]
    fn normal_and_familiar_forms_parse_back_to_the_same_reference(
        domain in proptest::option::of("(localhost|[a-z]{1,8}\\.[a-z]{2,3}|\\[::[0-9a-f]{1,4}\\])(:[0-9]{1,5})?"),
        // No dot in the first element: without a registry before it, it would be one.
        path in "[a-z0-9]{1,8}((_|__|-{1,3})[a-z0-9]{1,5}){0,2}(/[a-z0-9]{1,8}((\\.|_|__|-{1,3})[a-z0-9]{1,5}){0,2}){0,3}",
        tag in proptest::option::of("[A-Za-z0-9_][A-Za-z0-9_.-]{0,20}"),
        digest in proptest::option::of("sha256:[0-9a-f]{64}"),
    ) {
        let mut text = match domain { Some(domain) => format!("{domain}/{path}"), None => path };
        if let Some(tag) = tag { text = format!("{text}:{tag}"); }
        if let Some(digest) = digest { text = format!("{text}@{digest}"); }
        let reference: Reference = text.parse().unwrap();
        prop_assert_eq!(&reference.to_string().parse::<Reference>().unwrap(), &reference);
        prop_assert_eq!(&reference.familiar().parse::<Reference>().unwrap(), &reference);
        prop_assert!(reference.tag().is_some() || reference.digest().is_some());
    }
}
