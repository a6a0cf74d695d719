use std::time::Duration;

/// How pods are attached to a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    Host,
    /// A network namespace of the pod's own.
    Own,
}

/// A runtime under measurement, as named on the command line: `NAME=SOCKET` or `NAME=SOCKET#HANDLER`.
#[derive(Clone, Debug)]
pub struct Named {
    pub name: String,
    pub socket: String,
    pub handler: String,
}

/// What hull-bench was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    pub workload: String,
    /// What the workload is called in tables, JSON and pictures.
    pub title: String,
    pub image: String,
    pub rounds: usize,
    pub pods: usize,
    pub containers: usize,
    pub parallel: usize,
    pub seconds: u64,
    pub network: Network,
    pub spaced: Duration,
    pub json: Option<String>,
    pub registry_pid: Option<u32>,
    /// Programs that are measured beside the runtimes: a name, and a script that takes `run` or `clean`.
    pub programs: Vec<(String, String)>,
    pub peers: Vec<Named>,
}

impl Options {
    /// From the words after the program's name; the error names what is wrong.
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Options, String> {
        let mut words = words;
        let workload = words.next().ok_or("no workload")?;
        let mut options = Options {
            title: workload.clone(),
            workload,
            image: String::new(),
            rounds: 20,
            pods: 30,
            containers: 1000,
            parallel: 8,
            seconds: 10,
            network: Network::Host,
            spaced: Duration::ZERO,
            json: None,
            registry_pid: None,
            programs: Vec::new(),
            peers: Vec::new(),
        };
        while let Some(word) = words.next() {
            options.take(&word, &mut words)?;
        }
        match options.peers.is_empty() && options.programs.is_empty() {
            true => Err("no runtime: name one as NAME=SOCKET".into()),
            false => Ok(options),
        }
    }

    fn take(&mut self, word: &str, words: &mut impl Iterator<Item = String>) -> Result<(), String> {
        if !word.starts_with("--") {
            let (name, socket) = word.split_once('=').ok_or(format!("{word:?} is no NAME=SOCKET"))?;
            let (socket, handler) = socket.split_once('#').unwrap_or((socket, ""));
            let (name, socket, handler) = (name.to_owned(), socket.to_owned(), handler.to_owned());
            self.peers.push(Named { name, socket, handler });
            return Ok(());
        }
        let value = words.next().ok_or(format!("{word} needs a value"))?;
        let number = || value.parse::<usize>().map_err(|_| format!("{word} needs a number, not {value:?}"));
        match word {
            "--title" => self.title = value,
            "--image" => self.image = value,
            "--rounds" => self.rounds = number()?,
            "--pods" => self.pods = number()?,
            "--containers" => self.containers = number()?,
            "--parallel" => self.parallel = number()?,
            "--seconds" => self.seconds = number()? as u64,
            "--spaced" => self.spaced = Duration::from_millis(number()? as u64),
            "--registry-pid" => self.registry_pid = Some(number()? as u32),
            "--json" => self.json = Some(value),
            "--network" => {
                self.network = match value.as_str() {
                    "host" => Network::Host,
                    "own" => Network::Own,
                    _ => return Err(format!("--network is host or own, not {value:?}")),
                };
            }
            "--program" => {
                let (name, script) = value.split_once('=').ok_or("--program needs NAME=SCRIPT")?;
                self.programs.push((name.to_owned(), script.to_owned()));
            }
            _ => return Err(format!("unknown option {word}")),
        }
        Ok(())
    }
}
