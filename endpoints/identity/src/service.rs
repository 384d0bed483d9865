//! The Workload API of one workload (SPIFFE_Workload_API.md).

use futures_util::stream::{self, BoxStream, StreamExt};
use meridio_proto::spiffe::{
    JwtBundlesRequest, JwtBundlesResponse, Jwtsvid, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest, X509svidResponse,
    spiffe_workload_api_server::SpiffeWorkloadApi,
};
use nsm_identity::{Authority, Error, SpiffeId, token};
use prost_types::{ListValue, Struct, Value, value::Kind};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tonic::{Request, Response, Status};

/// Life of a JWT-SVID, as SPIRE's default.
const JWT_TTL: Duration = Duration::from_secs(300);

/// What all workloads share.
#[derive(Clone, Debug)]
pub(crate) struct Issuer {
    authority: Arc<Authority>,
    ttl: Duration,
}

impl Issuer {
    pub(crate) fn new(authority: Arc<Authority>, ttl: Duration) -> Self {
        Self { authority, ttl }
    }

    /// The API for one workload, or why there cannot be one of that name.
    pub(crate) fn workload(&self, name: &str) -> Result<Workload, Error> {
        Ok(Workload { id: SpiffeId::new(self.authority.trust_domain(), name)?, issuer: self.clone() })
    }

    fn domain(&self) -> String {
        format!("spiffe://{}", self.authority.trust_domain())
    }
}

/// One workload.
#[derive(Clone, Debug)]
pub(crate) struct Workload {
    issuer: Issuer,
    id: SpiffeId,
}

impl Workload {
    pub(crate) fn id(&self) -> &SpiffeId {
        &self.id
    }

    fn x509(&self) -> Result<X509svidResponse, Status> {
        let svid = self.issuer.authority.issue(self.id.path(), self.issuer.ttl).map_err(internal)?;
        tracing::debug!(id = %self.id, "X.509-SVID issued");
        let one = X509svid {
            spiffe_id: self.id.to_string(),
            x509_svid: svid.chain().iter().flat_map(|der| der.iter().copied()).collect(),
            x509_svid_key: svid.key_der().to_vec(),
            bundle: self.issuer.authority.certificate().to_vec(),
            hint: String::new(),
        };
        Ok(X509svidResponse { svids: vec![one], ..X509svidResponse::default() })
    }
}

/// Proof that the caller means it (section 6.1): a program tricked into connecting would not set it.
fn check_header<T>(request: &Request<T>) -> Result<(), Status> {
    match request.metadata().get("workload.spiffe.io") {
        Some(value) if value == "true" => Ok(()),
        _ => Err(Status::invalid_argument("security header missing from request")),
    }
}

fn internal(cause: Error) -> Status {
    Status::internal(cause.to_string())
}

/// One message, then silence: what it tells does not change while the issuer runs.
fn once<T: Send + 'static>(message: T) -> Response<BoxStream<'static, Result<T, Status>>> {
    Response::new(stream::iter([Ok(message)]).chain(stream::pending()).boxed())
}

#[tonic::async_trait]
impl SpiffeWorkloadApi for Workload {
    type FetchX509SVIDStream = BoxStream<'static, Result<X509svidResponse, Status>>;
    type FetchX509BundlesStream = BoxStream<'static, Result<X509BundlesResponse, Status>>;
    type FetchJWTBundlesStream = BoxStream<'static, Result<JwtBundlesResponse, Status>>;

    async fn fetch_x509svid(
        &self,
        request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        check_header(&request)?;
        let (workload, pause) = (self.clone(), self.issuer.ttl / 2);
        let rotation = stream::unfold(Duration::ZERO, move |wait| {
            let workload = workload.clone();
            async move {
                tokio::time::sleep(wait).await;
                Some((workload.x509(), pause))
            }
        });
        Ok(Response::new(rotation.boxed()))
    }

    async fn fetch_x509_bundles(
        &self,
        request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        check_header(&request)?;
        let bundles = HashMap::from([(self.issuer.domain(), self.issuer.authority.certificate().to_vec())]);
        Ok(once(X509BundlesResponse { bundles: bundles.into_iter().collect(), ..X509BundlesResponse::default() }))
    }

    async fn fetch_jwtsvid(&self, request: Request<JwtsvidRequest>) -> Result<Response<JwtsvidResponse>, Status> {
        check_header(&request)?;
        let request = request.into_inner();
        if request.audience.is_empty() {
            return Err(Status::invalid_argument("audience must be specified"));
        }
        if !request.spiffe_id.is_empty() && request.spiffe_id != self.id.as_str() {
            return Err(Status::permission_denied(format!("no identity {:?} issued here", request.spiffe_id)));
        }
        let audience: Vec<&str> = request.audience.iter().map(String::as_str).collect();
        let token = self.issuer.authority.issue_jwt(self.id.path(), &audience, JWT_TTL).map_err(internal)?;
        let svid = Jwtsvid { spiffe_id: self.id.to_string(), svid: token.jwt, hint: String::new() };
        Ok(Response::new(JwtsvidResponse { svids: vec![svid] }))
    }

    async fn fetch_jwt_bundles(
        &self,
        request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        check_header(&request)?;
        let bundles = [(self.issuer.domain(), self.issuer.authority.jwks().into_bytes())];
        Ok(once(JwtBundlesResponse { bundles: bundles.into_iter().collect() }))
    }

    async fn validate_jwtsvid(
        &self,
        request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        check_header(&request)?;
        let request = request.into_inner();
        let refuse = |cause: String| Status::invalid_argument(cause);
        let claims = token::verify_es256(&request.svid, self.issuer.authority.certificate())
            .map_err(|cause| refuse(cause.to_string()))?;
        if claims.expired(SystemTime::now()) {
            return Err(refuse("the token has ended".into()));
        }
        if !claims.aud.contains(&request.audience) {
            return Err(refuse(format!("the token is not for {:?}", request.audience)));
        }
        let string = |text: &str| Value { kind: Some(Kind::StringValue(text.to_owned())) };
        let audience = ListValue { values: claims.aud.iter().map(|one| string(one)).collect() };
        let fields = [
            ("sub", string(&claims.sub)),
            ("aud", Value { kind: Some(Kind::ListValue(audience)) }),
            ("exp", Value { kind: Some(Kind::NumberValue(claims.exp.unwrap_or_default() as f64)) }),
        ];
        let fields = fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Ok(Response::new(ValidateJwtsvidResponse { spiffe_id: claims.sub, claims: Some(Struct { fields }) }))
    }
}
