//! How the Stream* calls cut a list: into messages that are small however long the list is.

use futures::stream::{BoxStream, Stream, StreamExt};
use prost::Message;
use tonic::Status;

/// A chunk is sent when it has reached this size, in bytes; one item may be larger by itself.
const CHUNK: usize = 256 << 10;
/// Nor has a chunk more items than this.
const ITEMS: usize = 1000;

/// The items in order, in chunks, each made a message by `wrap`. Items are asked for only as fast as the client reads.
pub(crate) fn chunks<T, M>(
    items: impl Stream<Item = T> + Send + 'static,
    wrap: impl Fn(Vec<T>) -> M + Send + 'static,
) -> BoxStream<'static, Result<M, Status>>
where
    T: Message + 'static,
    M: Send + 'static,
{
    let state = (Box::pin(items), wrap);
    let cut = futures::stream::unfold(state, |(mut items, wrap)| async move {
        let (mut chunk, mut size) = (Vec::new(), 0);
        while let Some(item) = items.next().await {
            size += item.encoded_len();
            chunk.push(item);
            if size >= CHUNK || chunk.len() >= ITEMS {
                break;
            }
        }
        if chunk.is_empty() { None } else { Some((Ok(wrap(chunk)), (items, wrap))) }
    });
    cut.boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::runtime::{Container, StreamContainersResponse};

    #[tokio::test]
    async fn a_long_list_comes_in_small_pieces_whole_and_in_order() {
        let item = |number: usize| Container { id: format!("{number:0>1000}"), ..Container::default() };
        let items = futures::stream::iter((0..2000).map(item));
        let pieces: Vec<_> =
            chunks(items, |containers| StreamContainersResponse { containers }).collect().await;
        assert!(pieces.len() > 5);
        let mut next = 0;
        for piece in pieces {
            let piece = piece.unwrap();
            assert!(piece.encoded_len() < CHUNK + 4096 && !piece.containers.is_empty());
            for container in piece.containers {
                assert_eq!(container, item(next));
                next += 1;
            }
        }
        assert_eq!(next, 2000);
    }

    #[tokio::test]
    async fn an_empty_list_is_an_empty_stream() {
        let items = futures::stream::iter(Vec::<Container>::new());
        assert_eq!(chunks(items, |containers| containers).count().await, 0);
    }
}
