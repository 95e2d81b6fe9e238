//! What every worker says of its objects, added up.

use futures_util::future::try_join_all;
use http::{Method, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use protocol::{Problem, Ring};
use serde::de::DeserializeOwned;

use super::{Front, PAGE_BYTES_MAX, get};
use crate::admin::{Page, json};
use crate::advisor::{self, Seen};
use crate::hot::HotPage;

impl Front {
    /// `/advisor`, or `/hot` of nodes.
    pub(super) async fn gathered(
        &self,
        ring: &Ring,
        request: &http::Request<Incoming>,
    ) -> Result<Page, Problem> {
        if request.method() != Method::GET {
            return Err(Problem::method_not_allowed(
                "GET",
                format!("{} is not offered here", request.method()),
            ));
        }
        match request.uri().path() {
            "/advisor" => {
                let mut all = Seen::default();
                for seen in self.gather(ring, "/advisor").await? {
                    all.add(seen);
                }
                Ok(json(&advisor::report(&all)))
            }
            "/hot" | "/hot/nodes" => {
                let mut all = HotPage::default();
                for page in self.gather(ring, "/hot").await? {
                    all.add(page);
                }
                Ok(json(&all))
            }
            path => Err(Problem::not_found(format!(
                "there is no page {path:?} here"
            ))),
        }
    }

    /// The answers of all workers.
    async fn gather<T: DeserializeOwned>(
        &self,
        ring: &Ring,
        path: &str,
    ) -> Result<Vec<T>, Problem> {
        let asked = self.workers(ring).map(|worker| async {
            let address = &worker.address;
            let answer = self.ask(address, get(path.parse().ok())?).await?;
            let broken = |error: &dyn std::fmt::Display| {
                Problem::unavailable(format!("the answer of worker {address}: {error}"))
            };
            let status = answer.status();
            let body = Limited::new(answer.into_body(), PAGE_BYTES_MAX).collect();
            let body = body.await.map_err(|error| broken(&error))?.to_bytes();
            if status != StatusCode::OK {
                return Err(broken(&String::from_utf8_lossy(&body)));
            }
            serde_json::from_slice(&body).map_err(|error| broken(&error))
        });
        try_join_all(asked).await
    }
}
