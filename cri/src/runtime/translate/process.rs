//! What a container executes: arguments, environment, working directory.

use std::collections::HashMap;

use super::invalid;
use crate::api::runtime::{ContainerConfig, KeyValue};
use crate::runtime::Error;
use crate::store::record::ImageFacts;

/// For images that set none.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The arguments: CRI's command replaces ENTRYPOINT and CMD, CRI's args alone replace CMD
/// (kubernetes.io, "Define a Command and Arguments for a Container").
pub fn arguments(config: &ContainerConfig, image: &ImageFacts) -> Result<Vec<String>, Error> {
    let (command, args) = if !config.command.is_empty() {
        (&config.command, &config.args)
    } else if !config.args.is_empty() {
        (&image.entrypoint, &config.args)
    } else {
        (&image.entrypoint, &image.cmd)
    };
    let arguments: Vec<String> = command.iter().chain(args).cloned().collect();
    if arguments.first().is_none_or(String::is_empty) {
        return Err(invalid("there is no command: neither the request nor the image names one"));
    }
    if arguments.iter().any(|argument| argument.contains('\0')) {
        return Err(invalid("an argument of the command contains a zero byte"));
    }
    Ok(arguments)
}

/// The environment: defaults, then the image's, then CRI's, then that of CDI devices; a later one replaces an earlier one of the same name.
pub fn environment(
    config: &ContainerConfig,
    image: &ImageFacts,
    hostname: &str,
    of_devices: &[String],
) -> Result<Vec<String>, Error> {
    let mut merged = Environment::default();
    merged.set(DEFAULT_PATH.to_owned());
    if config.tty {
        merged.set("TERM=xterm".to_owned());
    }
    merged.set(format!("HOSTNAME={hostname}"));
    for entry in &image.env {
        if entry.contains('\0') {
            return Err(invalid("an environment variable of the image contains a zero byte"));
        }
        // One without a value says nothing.
        if entry.contains('=') {
            merged.set(entry.clone());
        }
    }
    for KeyValue { key, value } in &config.envs {
        if key.is_empty() || key.contains(['=', '\0']) || value.contains(&0) {
            return Err(invalid(format!("{key:?} cannot be an environment variable")));
        }
        let value = std::str::from_utf8(value)
            .map_err(|_| invalid(format!("the value of the environment variable {key:?} is not UTF-8")))?;
        merged.set(format!("{key}={value}"));
    }
    for entry in of_devices {
        merged.set(entry.clone());
    }
    Ok(merged.entries)
}

/// `KEY=value` in the order of first mention.
#[derive(Default)]
struct Environment {
    entries: Vec<String>,
    places: HashMap<String, usize>,
}

impl Environment {
    fn set(&mut self, entry: String) {
        let key = entry.split('=').next().unwrap_or_default().to_owned();
        match self.places.get(&key) {
            Some(place) => self.entries[*place] = entry,
            None => {
                self.places.insert(key, self.entries.len());
                self.entries.push(entry);
            }
        }
    }
}

/// The working directory: CRI's, or the image's, or the root.
pub fn working_directory(config: &ContainerConfig, image: &ImageFacts) -> Result<String, Error> {
    let asked = [&config.working_dir, &image.working_dir];
    let directory = asked.into_iter().find(|path| !path.is_empty()).map_or("/", String::as_str);
    if !directory.starts_with('/') || directory.contains('\0') {
        return Err(invalid(format!("the working directory {directory:?} is not an absolute path")));
    }
    Ok(directory.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn command_and_args_replace_entrypoint_and_cmd_as_kubernetes_says() {
        for (entrypoint, cmd, command, args, expected) in [
            ("/ep", "image cmd", "", "", "/ep image cmd"),
            ("/ep", "image cmd", "/c", "", "/c"),
            ("/ep", "image cmd", "", "zoo", "/ep zoo"),
            ("/ep", "image cmd", "/c", "zoo", "/c zoo"),
            ("", "sh", "", "", "sh"),
            ("", "sh", "", "ls -l", "ls -l"),
        ] {
            let image = ImageFacts { entrypoint: words(entrypoint), cmd: words(cmd), ..Default::default() };
            let config = ContainerConfig { command: words(command), args: words(args), ..Default::default() };
            assert_eq!(arguments(&config, &image).unwrap(), words(expected));
        }
    }

    #[test]
    fn no_command_at_all_is_refused() {
        assert!(arguments(&ContainerConfig::default(), &ImageFacts::default()).is_err());
        let empty = ContainerConfig { command: vec![String::new()], ..Default::default() };
        assert!(arguments(&empty, &ImageFacts::default()).is_err());
    }

    #[test]
    fn the_environment_of_cri_wins_by_name_and_keeps_the_order() {
        let image = ImageFacts { env: words("PATH=/bin A=1 B=2 BROKEN"), ..Default::default() };
        let set = |key: &str, value: &str| KeyValue { key: key.into(), value: value.as_bytes().to_vec() };
        let config =
            ContainerConfig { envs: vec![set("A", "x=y"), set("C", "")], tty: true, ..Default::default() };
        let environment = environment(&config, &image, "pod", &["D=4".to_owned(), "C=5".to_owned()]).unwrap();
        assert_eq!(environment, ["PATH=/bin", "TERM=xterm", "HOSTNAME=pod", "A=x=y", "B=2", "C=5", "D=4"]);
    }

    #[test]
    fn variables_that_cannot_exist_are_refused() {
        for (key, value) in [("", "x"), ("A=B", "x"), ("A", "\0"), ("A\0", "x")] {
            let envs = vec![KeyValue { key: key.into(), value: value.as_bytes().to_vec() }];
            let config = ContainerConfig { envs, ..Default::default() };
            assert!(environment(&config, &ImageFacts::default(), "", &[]).is_err(), "{key:?}");
        }
        let image = ImageFacts { env: vec!["A=\0".into()], ..Default::default() };
        assert!(environment(&ContainerConfig::default(), &image, "", &[]).is_err());
    }

    #[test]
    fn the_working_directory_is_absolute() {
        let image = ImageFacts { working_dir: "/srv".into(), ..Default::default() };
        let asked = |path: &str| ContainerConfig { working_dir: path.into(), ..Default::default() };
        assert_eq!(working_directory(&asked(""), &image).unwrap(), "/srv");
        assert_eq!(working_directory(&asked("/tmp"), &image).unwrap(), "/tmp");
        assert_eq!(working_directory(&asked(""), &ImageFacts::default()).unwrap(), "/");
        assert!(working_directory(&asked("tmp"), &image).is_err());
    }
}
