//! The image policy at work: asked before a pull, and again before a container is made.

use hull_images::{Image, Reference};

use super::{Error, Result, Runtime};

impl Runtime {
    /// Refuses what may not be pulled.
    pub(crate) fn accept_for_pull(&self, reference: &Reference) -> Result<()> {
        let Some(file) = &self.image_policy else { return Ok(()) };
        let refused = |error| {
            tracing::warn!(image = %reference, %error, "a pull is refused");
            Error::Policy(error)
        };
        file.current().map_err(refused)?.check(reference).map_err(refused)
    }

    /// Refuses an image of which no container may be made. `asked` is how it was asked for, the best known first: ids
    /// and names that do not mean the image say nothing.
    pub(super) fn accept_for_container(&self, image: &Image, asked: &[&str]) -> Result<()> {
        let Some(file) = &self.image_policy else { return Ok(()) };
        let refused = |error| {
            tracing::warn!(image = image.id, %error, "a container is refused");
            Error::FailedPrecondition(format!("cannot make a container: {error}"))
        };
        file.current().map_err(refused)?.check_image(image, named(image, asked).as_ref()).map_err(refused)
    }
}

/// The first of `asked` that is a name of the image.
fn named(image: &Image, asked: &[&str]) -> Option<Reference> {
    let references = asked.iter().filter_map(|name| name.parse::<Reference>().ok());
    let mut known = references.filter(|reference| {
        let name = reference.name();
        image.repo_tags.contains(&name) || image.repo_digests.contains(&name)
    });
    known.next()
}
