use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Hears what an operator should know of a device: its name and a sentence. Called on a device's thread: must not wait.
pub type OnFault = Arc<dyn Fn(&str, &str) + Send + Sync>;

/// Tells of faults, but not more often than an operator can read: the guest could make them by the thousand.
pub(super) struct Faults {
    device: String,
    tell: OnFault,
    last: Mutex<Option<Instant>>,
}

/// Between two of one device.
const PAUSE: Duration = Duration::from_secs(10);

impl Faults {
    pub(super) fn new(device: &str, tell: OnFault) -> Self {
        Self { device: device.to_owned(), tell, last: Mutex::new(None) }
    }

    /// Tells of a fault, unless it just told of one.
    pub(super) fn tell(&self, message: impl FnOnce() -> String) {
        let now = Instant::now();
        {
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            if last.is_some_and(|last| now.duration_since(last) < PAUSE) {
                return;
            }
            *last = Some(now);
        }
        (self.tell)(&self.device, &message());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_flood_the_operator() {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let to = heard.clone();
        let faults =
            Faults::new("x", Arc::new(move |_, message| to.lock().unwrap().push(message.to_owned())));
        (0..1000).for_each(|i| faults.tell(|| i.to_string()));
        assert_eq!(*heard.lock().unwrap(), ["0"]);
    }
}
