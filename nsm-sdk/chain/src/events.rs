//! The stream of a monitor's events, both ends.
//!
//! A manager has a stream for each of its connections, towards the client and towards the next hop, and something happens on it
//! once in a while. The streams of the gRPC library keep their last message and the room for the next one as long as they live. These
//! keep nothing between events.

use crate::{
    ConnectionEvent, EventStream, MonitorScopeSelector,
    elements::{
        authorize::Callers,
        monitor::{Hub, Subscription},
    },
};
use bytes::{Buf, BufMut, Bytes};
use futures_util::{Stream, StreamExt, future::BoxFuture, stream};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body::{Body as _, Frame};
use http_body_util::Full;
use nsm_transport::ConnInfo;
use prost::Message;
use std::{
    convert::Infallible,
    future::poll_fn,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
};
use tonic::{
    Status, Streaming, body::Body, client::GrpcService, codec::Codec, codegen::StdError, server::NamedService,
};
use tower::Service;

const NAME: &str = "connection.MonitorConnection";
const PATH: &str = "/connection.MonitorConnection/MonitorConnections";
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");
/// Before each message: whether it is compressed, and its length.
const PREFIX: usize = 5;
/// What gRPC accepts unless told otherwise.
const LONGEST: usize = 4 << 20;

fn framed(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = Vec::with_capacity(PREFIX + length);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // A vector has room for everything.
    let _ = message.encode(&mut bytes);
    bytes.into()
}

/// The gRPC server of `connection.MonitorConnection`.
#[derive(Clone, Debug)]
pub struct MonitorServer {
    hub: Hub,
    callers: Option<Callers>,
}

impl MonitorServer {
    /// Serves the events of a hub.
    pub fn new(hub: Hub) -> Self {
        Self { hub, callers: None }
    }

    /// Only who has a connection may watch it, as far as `callers` knows.
    #[must_use]
    pub fn guarded(mut self, callers: Option<Callers>) -> Self {
        self.callers = callers;
        self
    }

    async fn answer(&self, request: Request<Body>) -> Result<Response<Body>, Status> {
        if request.uri().path() != PATH {
            return Err(Status::unimplemented(format!("{} is no method of {NAME}", request.uri().path())));
        }
        let peer = request.extensions().get::<ConnInfo>().and_then(|info| info.peer.clone());
        let decoder = nsm_proto::codec::Codec::<MonitorScopeSelector, MonitorScopeSelector>::default().decoder();
        let mut messages = pin!(Streaming::new_request(decoder, request.into_body(), None, None));
        let selector = messages.message().await?.ok_or_else(|| Status::internal("a request without a message"))?;
        if let Some((callers, peer)) = self.callers.as_ref().zip(peer)
            && !callers.may_watch(&peer, &selector)
        {
            return Err(Status::permission_denied(
                "no sufficient privileges: none of its connections is to be watched",
            ));
        }
        let mut response = Response::new(Body::new(Events(Some(self.hub.subscribe(selector)))));
        response.headers_mut().insert(header::CONTENT_TYPE, GRPC);
        Ok(response)
    }
}

impl NamedService for MonitorServer {
    const NAME: &'static str = NAME;
}

impl Service<Request<Body>> for MonitorServer {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let server = self.clone();
        Box::pin(async move { Ok(server.answer(request).await.unwrap_or_else(Status::into_http)) })
    }
}

/// What a subscriber is sent, until the subscription ends.
struct Events(Option<Subscription>);

impl http_body::Body for Events {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(events) = &mut self.0 else { return Poll::Ready(None) };
        Poll::Ready(Some(match ready!(Pin::new(events).poll_next(cx)) {
            Some(event) => Ok(Frame::data(framed(&event))),
            None => {
                self.0 = None;
                let mut trailers = HeaderMap::new();
                Status::ok("").add_header(&mut trailers).map(|()| Frame::trailers(trailers))
            }
        }))
    }
}

/// Opens a stream at another process; returns once that has accepted it.
pub(crate) async fn open<S>(mut service: S, selector: &MonitorScopeSelector) -> Result<EventStream, Status>
where
    S: GrpcService<Body, ResponseBody: http_body::Body<Data = Bytes, Error: Into<StdError>> + Send + 'static>,
{
    poll_fn(|cx| service.poll_ready(cx)).await.map_err(|cause| Status::from_error(cause.into()))?;
    let mut request = Request::new(Body::new(Full::new(framed(selector))));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = Uri::from_static(PATH);
    request.headers_mut().insert(header::TE, HeaderValue::from_static("trailers"));
    request.headers_mut().insert(header::CONTENT_TYPE, GRPC);
    let response = service.call(request).await.map_err(|cause| Status::from_error(cause.into()))?;
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() != tonic::Code::Ok => return Err(status),
        Some(_) => return Ok(stream::empty().boxed()),
        None => {}
    }
    let text = || format!("answered by HTTP status {}", response.status());
    match response.status() {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Err(Status::unimplemented(text())),
        StatusCode::UNAUTHORIZED => return Err(Status::unauthenticated(text())),
        StatusCode::FORBIDDEN => return Err(Status::permission_denied(text())),
        StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE => return Err(Status::unavailable(text())),
        _ => return Err(Status::unknown(text())),
    }
    Ok(Reader { body: Body::new(response.into_body()), part: Vec::new(), ended: false }.boxed())
}

/// Takes the events out of an answer.
struct Reader {
    body: Body,
    /// What has come of the next message.
    part: Vec<u8>,
    ended: bool,
}

impl Reader {
    /// The next message, if all of it has come.
    fn event(&mut self) -> Result<Option<ConnectionEvent>, Status> {
        let Some((mut prefix, rest)) = self.part.split_at_checked(PREFIX) else { return Ok(None) };
        if prefix.get_u8() != 0 {
            return Err(Status::internal("an event is compressed, which was not asked for"));
        }
        let length = prefix.get_u32() as usize;
        if length > LONGEST {
            return Err(Status::out_of_range(format!("an event of {length} bytes, more than {LONGEST}")));
        }
        let Some(message) = rest.get(..length) else { return Ok(None) };
        let event = ConnectionEvent::decode(message).map_err(|cause| Status::internal(cause.to_string()))?;
        self.part.drain(..PREFIX + length);
        if self.part.is_empty() {
            self.part = Vec::new();
        }
        Ok(Some(event))
    }

    fn end(status: Option<Status>) -> Option<Status> {
        match status {
            Some(status) if status.code() == tonic::Code::Ok => None,
            Some(status) => Some(status),
            None => Some(Status::unknown("the stream has ended without a status")),
        }
    }
}

impl Stream for Reader {
    type Item = Result<ConnectionEvent, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            let failed = match self.event() {
                Ok(Some(event)) => return Poll::Ready(Some(Ok(event))),
                Ok(None) => match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                    None => Self::end(None),
                    Some(Err(status)) => Some(status),
                    Some(Ok(frame)) => match frame.into_data() {
                        Ok(data) => {
                            self.part.extend_from_slice(&data);
                            continue;
                        }
                        Err(frame) => Self::end(frame.trailers_ref().and_then(Status::from_header_map)),
                    },
                },
                Err(status) => Some(status),
            };
            self.ended = true;
            return Poll::Ready(failed.map(Err));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Connection, ConnectionEventType, State};
    use futures_util::FutureExt;
    use http_body_util::StreamBody;
    use std::collections::BTreeMap;
    use tonic::Code;

    fn connection(id: &str) -> Connection {
        Connection { id: id.into(), ..Default::default() }
    }

    fn event(id: &str) -> ConnectionEvent {
        let connections = BTreeMap::from([(id.to_owned(), connection(id))]);
        ConnectionEvent { r#type: ConnectionEventType::Update.into(), connections }
    }

    type Answer = Response<Body>;

    /// Opens a stream at something that gives this answer to everything.
    async fn answered(answer: impl Fn() -> Answer + Clone) -> Result<EventStream, Status> {
        let service = tower::service_fn(move |_: Request<Body>| std::future::ready(Ok::<_, Infallible>(answer())));
        open(service, &MonitorScopeSelector::default()).await
    }

    fn body(frames: Vec<Frame<Bytes>>) -> Answer {
        Response::new(Body::new(StreamBody::new(stream::iter(frames.into_iter().map(Ok::<_, Status>)))))
    }

    fn trailers(status: &Status) -> HeaderMap {
        let mut trailers = HeaderMap::new();
        status.add_header(&mut trailers).unwrap();
        trailers
    }

    #[tokio::test]
    async fn what_the_hub_says_arrives_until_it_ends() {
        let hub = Hub::new();
        hub.update(connection("c"));
        let mut events = open(MonitorServer::new(hub.clone()), &MonitorScopeSelector::default()).await.unwrap();
        let mut next = async || events.next().await.map(|event| event.unwrap());
        let first = next().await.unwrap();
        assert_eq!((first.r#type(), first.connections.len()), (ConnectionEventType::InitialStateTransfer, 1));
        let mut down = connection("c");
        down.set_state(State::Down);
        hub.update(down.clone());
        assert_eq!(next().await.unwrap().connections["c"], down);
        assert_eq!(hub.subscribers(), 1);
        hub.end();
        assert_eq!(next().await, None);
        drop(events);
        assert_eq!(hub.subscribers(), 0);
    }

    #[tokio::test]
    async fn other_methods_are_not_implemented() {
        let request = Request::builder().uri("/connection.MonitorConnection/Other").body(Body::empty()).unwrap();
        let answer = Service::call(&mut MonitorServer::new(Hub::new()), request).await.unwrap();
        assert_eq!(Status::from_header_map(answer.headers()).unwrap().code(), Code::Unimplemented);
    }

    /// Frames of HTTP/2 know nothing of messages.
    #[tokio::test]
    async fn messages_are_found_whatever_pieces_they_come_in() {
        let all: Vec<u8> = ["a", "b", "c"].iter().flat_map(|id| framed(&event(id))).collect();
        for size in [1, 4, 7, all.len()] {
            let mut frames: Vec<_> = all.chunks(size).map(|piece| Frame::data(Bytes::copy_from_slice(piece))).collect();
            frames.push(Frame::trailers(trailers(&Status::ok(""))));
            let frames = std::sync::Mutex::new(Some(frames));
            let take = || body(frames.lock().unwrap().take().unwrap());
            let service = tower::service_fn(|_: Request<Body>| std::future::ready(Ok::<_, Infallible>(take())));
            let events = open(service, &MonitorScopeSelector::default()).await.unwrap();
            let ids: Vec<_> =
                events.map(|event| event.unwrap().connections.into_keys().next().unwrap()).collect().await;
            assert_eq!(ids, ["a", "b", "c"], "pieces of {size}");
        }
    }

    #[test]
    fn nothing_is_kept_between_events() {
        let part = [framed(&event("a")), framed(&event("b"))].concat();
        let mut reader = Reader { body: Body::empty(), part, ended: false };
        assert_eq!(reader.event().unwrap(), Some(event("a")));
        assert_eq!(reader.event().unwrap(), Some(event("b")));
        assert_eq!((reader.event().unwrap(), reader.part.capacity()), (None, 0));
    }

    /// What ends the stream is said once, and nothing after it.
    #[tokio::test]
    async fn a_stream_that_is_wrong_or_breaks_off_ends_with_the_cause() {
        let text = |bytes: &'static [u8]| Frame::data(Bytes::from_static(bytes));
        let refused = || Frame::trailers(trailers(&Status::permission_denied("no")));
        let cases = [
            (&[1, 0, 0, 0, 0][..], Code::Internal),
            (&[0, 0xff, 0xff, 0xff, 0xff], Code::OutOfRange),
            (&[0, 0, 0, 0, 2, 0xff, 0xff], Code::Internal),
        ];
        for (bytes, code) in cases {
            let mut events = answered(move || body(vec![text(bytes)])).await.unwrap();
            assert_eq!(events.next().await.unwrap().unwrap_err().code(), code);
            assert!(events.next().await.is_none());
        }
        let mut events = answered(|| body(vec![])).await.unwrap();
        assert_eq!(events.next().await.unwrap().unwrap_err().code(), Code::Unknown);
        let mut events = answered(move || body(vec![refused()])).await.unwrap();
        assert_eq!(events.next().await.unwrap().unwrap_err().code(), Code::PermissionDenied);
        let mut events = answered(move || body(vec![text(&[0, 0, 0])])).await.unwrap();
        assert_eq!(events.next().await.unwrap().unwrap_err().code(), Code::Unknown, "in the middle of a message");
    }

    #[tokio::test]
    async fn a_refusal_is_known_at_once() {
        let code = async |answer: fn() -> Answer| answered(answer).await.err().map(|status| status.code());
        assert_eq!(code(|| Status::unimplemented("no monitor").into_http()).await, Some(Code::Unimplemented));
        let http = |status: StatusCode| {
            let mut answer = body(vec![]);
            *answer.status_mut() = status;
            answer
        };
        assert_eq!(answered(move || http(StatusCode::NOT_FOUND)).await.err().unwrap().code(), Code::Unimplemented);
        assert_eq!(answered(move || http(StatusCode::BAD_GATEWAY)).await.err().unwrap().code(), Code::Unavailable);
        assert_eq!(answered(move || http(StatusCode::IM_A_TEAPOT)).await.err().unwrap().code(), Code::Unknown);
        // One that is over at once is fine.
        let mut nothing = answered(|| Status::ok("").into_http()).await.unwrap();
        assert!(nothing.next().now_or_never().unwrap().is_none());
    }
}
