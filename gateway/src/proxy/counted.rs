//! Requests for sharded counters: answered here, with what their objects say.

use std::sync::Arc;

use bytes::Bytes;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, StatusCode};
use pingora_core::Result;
use pingora_proxy::Session;
use protocol::Problem;

use super::answers::{Answer, receive_rest, refuse};
use super::bounds::by;
use super::{Proxy, Request};
use crate::counters::Origin;
use crate::counters::ask::CounterAsk;
use crate::route::Fixed;

impl Proxy {
    /// What was sent to a shard may be counted, whether or not the client still waits.
    pub(super) async fn answer_counter(
        &self,
        session: &mut Session,
        request: &mut Request,
        ask: &CounterAsk,
    ) -> Result<bool> {
        receive_rest(session).await;
        let origin = Origin {
            request: request.id(),
            trace: request.trace,
            colo: request.colo,
            deadline: request.deadline,
        };
        let answered = by(request.deadline, self.counters.answer(ask, &origin)).await;
        let answered = answered.unwrap_or_else(|| {
            let over = request.overdue_problem(false);
            Err(over.unwrap_or_else(|| Problem::outcome_unknown("the deadline is over")))
        });
        match answered {
            Ok(json) => {
                let answer = Answer::Fixed(Arc::new(Fixed {
                    status: StatusCode::OK,
                    headers: vec![
                        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
                        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
                    ],
                    body: Bytes::from(json),
                }));
                answer.send(session, request).await?;
            }
            Err(problem) => refuse(session, request, &problem.into()).await?,
        }
        Ok(true)
    }
}
