//! `weft ingress serve`, `routes` and `explain`, and the routes of the agent's socket that answer them.

use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::routing::get;
use clap::{Args, Subcommand};
use serde::Deserialize;
use tokio::sync::watch;
use weft_ingress::explain::{Question, explain, routes};
use weft_ingress::lint::lint;
use weft_ingress::plan::IngressPlanner;
use weft_ingress::plan::table::RouteTable;
use weft_ingress::proxy::process;
use weft_model::Snapshot;
use weft_netstack::reconcile::Planner as _;

use crate::log::LogArgs;
use crate::status::{PATIENCE, ask};

#[derive(Args)]
pub(crate) struct IngressArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Print the table of routes, host by host, in the order in which they are tried
    Routes(RoutesArgs),
    /// Say what becomes of a request: which object, rule and endpoint, and why not another
    Explain(ExplainArgs),
    /// Serve the routes that the agent wrote: the proxy process
    Serve(ServeArgs),
}

#[derive(Args)]
struct ServeArgs {
    /// Where ingress/routes.json is read and ingress/ingress.sock is served
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
    /// Port for HTTP on each address of the table
    #[arg(long, default_value_t = 80)]
    http_port: u16,
    /// Port for HTTPS
    #[arg(long, default_value_t = 443)]
    https_port: u16,
    /// One for each core when it is not given
    #[arg(long)]
    threads: Option<usize>,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Args)]
struct RoutesArgs {
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

#[derive(Args)]
struct ExplainArgs {
    /// Such as GET
    method: String,
    /// Such as https://shop.example.com/cart
    url: String,
    /// Where the agent's socket is
    #[arg(long, default_value = "/run/weft")]
    run_dir: PathBuf,
}

pub(crate) fn run(args: &IngressArgs) -> anyhow::Result<()> {
    let text = match &args.command {
        Command::Serve(args) => return serve(args),
        Command::Routes(RoutesArgs { run_dir }) => ask(run_dir, "/ingress/routes", PATIENCE)?,
        Command::Explain(ExplainArgs { method, url, run_dir }) => {
            Question::new(method, url)?;
            let path = format!(
                "/ingress/explain?method={}&url={}",
                crate::policy::escape(method),
                crate::policy::escape(url)
            );
            ask(run_dir, &path, PATIENCE)?
        }
    };
    crate::print(&text)
}

fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    args.log.start()?;
    process::run(&process::Config {
        run_dir: args.run_dir.clone(),
        http_port: args.http_port,
        https_port: args.https_port,
        threads: args.threads,
    })?;
    Ok(())
}

type Snapshots = watch::Receiver<Option<Arc<Snapshot>>>;

/// For the agent's Unix socket.
pub(crate) fn router(snapshots: Snapshots) -> Router {
    Router::new()
        .route("/ingress/routes", get(answer_routes))
        .route("/ingress/explain", get(answer_explain))
        .route("/ingress/lint", get(answer_lint))
        .with_state(snapshots)
}

type Answer = Result<String, (StatusCode, String)>;

fn snapshot(snapshots: &Snapshots) -> Result<Arc<Snapshot>, (StatusCode, String)> {
    let none =
        || (StatusCode::SERVICE_UNAVAILABLE, "the agent has not read this cluster's objects yet".to_owned());
    snapshots.borrow().clone().ok_or_else(none)
}

/// The table of now, unless no Ingress is anybody's business here.
fn table(snapshots: &Snapshots) -> Result<RouteTable, (StatusCode, String)> {
    let snapshot = snapshot(snapshots)?;
    if !snapshot.config.ingress.on {
        return Err((
            StatusCode::UNPROCESSABLE_ENTITY,
            "Ingresses are not served here: --ingress is off".to_owned(),
        ));
    }
    Ok(IngressPlanner::default().plan(&snapshot).plan)
}

async fn answer_routes(State(snapshots): State<Snapshots>) -> Answer {
    Ok(routes(&table(&snapshots)?))
}

#[derive(Deserialize)]
struct Asked {
    method: String,
    url: String,
}

async fn answer_explain(State(snapshots): State<Snapshots>, Query(asked): Query<Asked>) -> Answer {
    let question = Question::new(&asked.method, &asked.url)
        .map_err(|error| (StatusCode::UNPROCESSABLE_ENTITY, error.to_string()))?;
    let lines = explain(&table(&snapshots)?, &question);
    Ok(lines.iter().map(|line| format!("{line}\n")).collect())
}

async fn answer_lint(State(snapshots): State<Snapshots>) -> Answer {
    Ok(crate::lint::text(&lint(&*snapshot(&snapshots)?, true)))
}
