//! The ambassador API (`ambassador.v1.Tap`).

use crate::{board::Board, names::StreamKey, store::Store};
use futures_util::stream::{self, BoxStream, StreamExt};
use meridio_proto::ambassador::v1::{self as api, tap_server::Tap};
use std::sync::{Arc, Mutex, PoisonError};
use tonic::{Request, Response, Status};

/// Serves applications. Calls return at once; the work is done by whoever watches the board.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    board: Board,
    store: Store,
    /// The board and its copy on disk change together.
    turn: Arc<Mutex<()>>,
}

impl Api {
    pub(crate) fn new(board: Board, store: Store) -> Self {
        Self { board, store, turn: Arc::default() }
    }

    fn change(
        &self,
        stream: &api::Stream,
        change: impl FnOnce(&Board, StreamKey) -> Result<(), String>,
    ) -> Result<(), Status> {
        let key = StreamKey::from_api(stream).map_err(Status::unknown)?;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        change(&self.board, key).map_err(Status::unknown)?;
        self.store.set_streams(&self.board.all());
        Ok(())
    }
}

#[tonic::async_trait]
impl Tap for Api {
    async fn open(&self, request: Request<api::Stream>) -> Result<Response<()>, Status> {
        self.change(request.get_ref(), |board, key| {
            let text = key.to_string();
            if board.open(key).map_err(|cause| cause.to_string())? {
                tracing::info!(stream = text, "open");
            }
            Ok(())
        })?;
        Ok(Response::new(()))
    }

    async fn close(&self, request: Request<api::Stream>) -> Result<Response<()>, Status> {
        self.change(request.get_ref(), |board, key| {
            tracing::info!(stream = %key, "close");
            board.close(&key);
            Ok(())
        })?;
        Ok(Response::new(()))
    }

    type WatchStream = BoxStream<'static, Result<api::StreamResponse, Status>>;

    /// The list at once, then after each change. Only the newest list is sent to an application that is slow.
    async fn watch(&self, request: Request<api::Stream>) -> Result<Response<Self::WatchStream>, Status> {
        let filter = request.into_inner();
        let start = (self.board.subscribe(), None::<api::StreamResponse>);
        let lists = stream::unfold(start, move |(mut board, mut sent)| {
            let filter = filter.clone();
            async move {
                loop {
                    if sent.is_some() {
                        board.changed().await.ok()?;
                    }
                    let selected = board
                        .borrow_and_update()
                        .iter()
                        .filter(|(key, _)| key.selected_by(&filter))
                        .map(|(key, status)| api::StreamStatus { status: (*status).into(), stream: Some(key.to_api()) })
                        .collect();
                    let list = api::StreamResponse { stream_status: selected };
                    if sent.as_ref() != Some(&list) {
                        sent = Some(list.clone());
                        return Some((Ok(list), (board, sent)));
                    }
                }
            }
        });
        Ok(Response::new(lists.boxed()))
    }
}
