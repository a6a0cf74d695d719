//! Operations are idempotent by name: a repeated request joins the one under way and gets its result.
//!
//! This is the incumbents' most reported failure: a client's deadline passes, its retry is told that the name is
//! reserved, for ever (containerd #4604).

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tonic::Code;

use super::{Error, error::Result};

/// How an operation ended: the id of what it made, or the failure.
type Outcome = std::result::Result<String, (String, Code)>;

/// Names with who has them: an operation under way, or an object.
#[derive(Debug)]
pub struct Names<K, R> {
    table: Arc<Mutex<HashMap<K, Owner<R>>>>,
}

#[derive(Debug)]
enum Owner<R> {
    Operation { request: R, outcome: watch::Receiver<Option<Outcome>> },
    Object(String),
}

/// What a claim on a name came to.
#[derive(Debug)]
pub enum Claim<K: Eq + Hash, R> {
    /// Nobody had it; the caller makes the object.
    New(Reservation<K, R>),
    /// The same request is under way.
    Joined(Joined),
    /// Another request for the same name is under way.
    Conflict,
    /// An object with this id has it.
    Held(String),
}

impl<K, R> Default for Names<K, R> {
    fn default() -> Self {
        Self { table: Arc::default() }
    }
}

impl<K: Eq + Hash + Clone, R: PartialEq> Names<K, R> {
    fn table(&self) -> MutexGuard<'_, HashMap<K, Owner<R>>> {
        lock(&self.table)
    }

    /// Claims `name` for what `request` asks.
    pub fn claim(&self, name: K, request: R) -> Claim<K, R> {
        let mut table = self.table();
        match table.get(&name) {
            Some(Owner::Object(id)) => return Claim::Held(id.clone()),
            Some(Owner::Operation { request: other, outcome }) if *other == request => {
                return Claim::Joined(Joined { outcome: outcome.clone() });
            }
            Some(Owner::Operation { .. }) => return Claim::Conflict,
            None => {}
        }
        let (sender, outcome) = watch::channel(None);
        table.insert(name.clone(), Owner::Operation { request, outcome });
        drop(table);
        Claim::New(Reservation { table: Arc::clone(&self.table), name: Some(name), outcome: sender })
    }

    /// An object found at the start has this name.
    pub fn hold(&self, name: K, id: String) {
        self.table().insert(name, Owner::Object(id));
    }

    /// The object is gone; its name is free if it is still the object's.
    pub fn release(&self, name: &K, id: &str) {
        let mut table = self.table();
        if matches!(table.get(name), Some(Owner::Object(holder)) if holder == id) {
            table.remove(name);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The right to make the object of a name. Dropped without an outcome, the name is free again.
#[derive(Debug)]
pub struct Reservation<K: Eq + Hash, R> {
    table: Arc<Mutex<HashMap<K, Owner<R>>>>,
    name: Option<K>,
    outcome: watch::Sender<Option<Outcome>>,
}

impl<K: Eq + Hash, R> Reservation<K, R> {
    /// Ends the operation: the name belongs to the new object, or is free again.
    pub fn complete(mut self, result: &Result<String>) {
        if let Some(name) = self.name.take() {
            let mut table = lock(&self.table);
            match result {
                Ok(id) => table.insert(name, Owner::Object(id.clone())),
                Err(_) => table.remove(&name),
            };
        }
        let outcome = match result {
            Ok(id) => Ok(id.clone()),
            Err(error) => Err((error.to_string(), error.code())),
        };
        self.outcome.send_replace(Some(outcome));
    }
}

impl<K: Eq + Hash, R> Drop for Reservation<K, R> {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            lock(&self.table).remove(&name);
        }
    }
}

/// Somebody else's operation with the same request.
#[derive(Debug)]
pub struct Joined {
    outcome: watch::Receiver<Option<Outcome>>,
}

impl Joined {
    /// Waits for it and returns its result.
    pub async fn result(mut self) -> Result<String> {
        match self.outcome.wait_for(Option::is_some).await {
            Ok(outcome) => match &*outcome {
                Some(Ok(id)) => Ok(id.clone()),
                Some(Err((message, code))) => Err(Error::Joined(message.clone(), *code)),
                None => Err(Error::Internal("an operation ended without a result".into())),
            },
            Err(_) => Err(Error::Internal("the operation that this one had joined was given up".into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new<'a>(names: &Names<&'a str, u8>, name: &'a str, request: u8) -> Reservation<&'a str, u8> {
        match names.claim(name, request) {
            Claim::New(reservation) => reservation,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn a_repeated_request_joins_the_one_under_way() {
        let names = Names::default();
        let reservation = new(&names, "web", 1);
        let Claim::Joined(joined) = names.claim("web", 1) else { panic!() };
        assert!(matches!(names.claim("web", 2), Claim::Conflict));
        reservation.complete(&Ok("id".into()));
        assert_eq!(joined.result().await.unwrap(), "id");
        assert!(matches!(names.claim("web", 1), Claim::Held(id) if id == "id"));
        names.release(&"web", "another");
        assert!(matches!(names.claim("web", 1), Claim::Held(_)));
        names.release(&"web", "id");
        new(&names, "web", 3);
    }

    #[tokio::test]
    async fn a_failed_operation_frees_the_name_and_tells_all_who_joined() {
        let names = Names::default();
        let reservation = new(&names, "web", 1);
        let Claim::Joined(joined) = names.claim("web", 1) else { panic!() };
        reservation.complete(&Err(Error::Unavailable("no network".into())));
        let error = joined.result().await.unwrap_err();
        assert_eq!((error.to_string().as_str(), error.code()), ("no network", Code::Unavailable));
        new(&names, "web", 1);
    }

    #[tokio::test]
    async fn an_abandoned_operation_frees_the_name() {
        let names = Names::default();
        let reservation = new(&names, "web", 1);
        let Claim::Joined(joined) = names.claim("web", 1) else { panic!() };
        drop(reservation);
        assert!(joined.result().await.is_err());
        new(&names, "web", 1);
    }
}
