//! What a whole request asks for: answered at once, or handed to [`super::answers`] and [`super::embeddings`]. Next on the data's way:
//! `serve::conn`, which has the answer.

use std::time::Instant;

use serde_json::{Value, json};

use super::{Owner, Server};
use crate::serve::admit::known_ids;
use crate::serve::check::Check;
use crate::serve::conn::Conn;
use crate::serve::memory::max_text_bytes;
use crate::serve::metrics;
use crate::sys::heartbeat::Message;
use crate::sys::record::{APP_STATES, Records};
use crate::sys::report::Kind;
use crate::wire::http::{Reply, Request};
use crate::wire::openai::{self, Call, Emitter};
use crate::wire::{Reject, Status};

/// Who asks for the machine's end where there is no appliance hears this.
pub(super) const NO_APPLIANCE: &str = "this is no appliance: whoever started the daemon stops it";

impl Server<'_, '_, '_> {
    pub(super) fn serve_requests(&mut self, key: u64, now: Instant) {
        loop {
            let Some(conn) = self.conns.get_mut(&key) else {
                return;
            };
            // An answer that is out lets the next pipelined request begin.
            conn.flush(now);
            let Some(request) = conn.next_request(now) else {
                if let Some(status) = conn.take_refused() {
                    self.counters.refused(status);
                }
                return;
            };
            self.call(key, request, now);
        }
    }

    fn call(&mut self, key: u64, request: Request, now: Instant) {
        let stopping = self.is_stopping();
        if let Some(conn) = self.conns.get_mut(&key)
            && let Err(denied) = conn.access()
        {
            let reject = denied.to_reject();
            self.counters.refused(reject.status);
            return conn.reject(Reply { keep_alive: false, ..request.reply }, &reject, now);
        }
        let reply = Reply { keep_alive: request.reply.keep_alive && !stopping, ..request.reply };
        let answer = match openai::route(&request) {
            Ok(Call::Generate(style, generate)) => match self.submit(Owner::Conn(key), &generate, now) {
                Ok(id) => {
                    let emitter = Emitter::new(id, self.setup.model_id, style, reply, &generate);
                    if let Some(conn) = self.conns.get_mut(&key) {
                        conn.queued(emitter);
                    }
                    return;
                }
                Err(reject) => Err(reject),
            },
            Ok(Call::Embed(embed)) => match self.begin_embeddings(key, &embed, reply, now) {
                Ok(()) => return,
                Err(reject) => Err(reject),
            },
            Ok(Call::Models) => Ok(openai::models_json(self.setup.model_id)),
            Ok(Call::Model(name)) if name == self.setup.model_id => Ok(openai::model_json(&name)),
            Ok(Call::Model(_)) => Err(openai::no_such_model(self.setup.model_id)),
            Ok(Call::Metrics) => {
                let text = self.counters.text(&self.setup.facts, &self.metrics_now());
                if let Some(conn) = self.conns.get_mut(&key) {
                    conn.answer_text(reply, metrics::CONTENT_TYPE, &text, now);
                }
                return;
            }
            Ok(Call::Health) => Ok(openai::health_json(&self.status())),
            Ok(Call::BootReport) => self.report_json(Kind::Boot),
            Ok(Call::SelftestReport) => self.report_json(Kind::Selftest),
            Ok(Call::Selftest) => self.power_over_socket(key, Message::Selftest { shown: false }),
            Ok(Call::Plan) => Ok(self.setup.plan.clone()),
            Ok(Call::Tokenize { content, add_special, parse_special }) => {
                self.tokenize(&content, add_special, parse_special)
            }
            Ok(Call::Detokenize(ids)) => self.detokenize(&ids),
            Ok(Call::PowerOff) => self.power_over_socket(key, Message::PowerOff),
            Ok(Call::Reboot) => self.power_over_socket(key, Message::Reboot),
            Err(reject) => Err(reject),
        };
        let status = if stopping { 503 } else { 200 };
        let Some(conn) = self.conns.get_mut(&key) else {
            return;
        };
        match answer {
            Ok(body) => conn.answer(reply, status, &body.to_string(), now),
            Err(reject) => {
                self.counters.refused(reject.status);
                log::debug!("refused with {} {}", reject.status, reject.code.unwrap_or("-"));
                conn.reject(reply, &reject, now);
            }
        }
    }

    /// What a peer asks of the machine: root may, whoever runs as this process does, and whom a rule gives the power.
    fn power_over_socket(&self, key: u64, message: Message) -> Result<Value, Reject> {
        let access = self.conns.get(&key).map(Conn::access);
        let Some(supervisor) = &self.setup.supervisor else {
            return Err(Reject::request(409, NO_APPLIANCE).with_code("no_appliance"));
        };
        if !access.is_some_and(|access| access.is_ok_and(|rule| rule.power)) {
            let why = "only root, the daemon's own user and whom a rule gives `power` may switch the board off, start it \
                       again or have it test itself";
            return Err(Reject::not_allowed(why));
        }
        match supervisor.line.send(message) {
            Ok(()) if matches!(message, Message::Selftest { .. }) => Ok(json!({"status": "started"})),
            Ok(()) => Ok(json!({"status": "stopping"})),
            Err(error) => Err(Reject::internal(format!("the supervisor is not to be reached: {error}"))),
        }
    }

    fn tokenize(&self, content: &str, add_special: bool, parse_special: bool) -> Result<Value, Reject> {
        let most = max_text_bytes(self.setup.context_tokens);
        if content.len() > most {
            let long = format!("the text has {} bytes: at most {most} are taken", content.len());
            return Err(Reject::field("content", long).with_code("context_length_exceeded"));
        }
        let tokens = self.setup.text.tokenize(content, add_special, parse_special);
        let tokens = tokens.map_err(|why| Reject::field("content", why))?;
        Ok(json!({"tokens": tokens.iter().map(|token| token.0).collect::<Vec<_>>()}))
    }

    fn detokenize(&self, ids: &[u32]) -> Result<Value, Reject> {
        let text = self.setup.text;
        let tokens = known_ids(ids, text.vocabulary_len(), "tokens")?;
        let bytes: usize = tokens.iter().map(|token| text.token_bytes(*token).len()).sum();
        let most = max_text_bytes(self.setup.context_tokens);
        if bytes > most {
            let long = format!("the tokens have {bytes} bytes of text: at most {most} are given");
            return Err(Reject::field("tokens", long).with_code("context_length_exceeded"));
        }
        Ok(json!({"content": String::from_utf8_lossy(&text.decode(&tokens))}))
    }

    pub(super) fn status(&self) -> Status {
        let blocks = self.link.kv_blocks();
        Status {
            model: self.setup.model_id.to_owned(),
            context_tokens: self.setup.context_tokens,
            active: self.running.len(),
            waiting: self.link.waiting(),
            uptime_s: self.started.elapsed().as_secs(),
            draining: self.is_stopping(),
            failures: self.setup.records.map(|path| Records::at(path).read()).unwrap_or_default(),
            check: self.setup.check.map(Check::state),
            apps: self.setup.apps.map(|folder| Records::at(folder.join(APP_STATES)).read()).unwrap_or_default(),
            kv_free: blocks.free,
            kv_used: blocks.used,
            kv_cached: blocks.cached,
        }
    }

    fn metrics_now(&self) -> metrics::Now {
        metrics::Now {
            uptime_s: self.started.elapsed().as_secs(),
            connections: self.conns.len(),
            running: self.running.len(),
            waiting: self.link.waiting(),
            blocks: self.link.kv_blocks(),
            counted: self.link.counted(),
        }
    }

    /// A report of the supervisor's; `None` where there is none.
    pub(super) fn report(&self, kind: Kind) -> Option<Vec<String>> {
        self.setup.supervisor.as_ref()?.reports.read(kind)
    }

    fn report_json(&self, kind: Kind) -> Result<Value, Reject> {
        let why = "there is no such report: PID 1 of an appliance makes them, a self-test's when one was asked for";
        let none = || Reject::request(404, why).with_code("no_report");
        self.report(kind).map(|lines| json!({"report": lines})).ok_or_else(none)
    }
}
